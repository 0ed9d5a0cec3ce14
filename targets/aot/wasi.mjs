// Runs a WebAssembly program in Node: node wasi.mjs PROGRAM WEIGHTS
import fs from "node:fs";
import path from "node:path";
import { WASI } from "node:wasi";

const [program, weights] = process.argv.slice(2).map((file) => path.resolve(file));
const wasi = new WASI({
  version: "preview1",
  args: ["program", "/data/" + path.basename(weights)],
  preopens: { "/data": path.dirname(weights) },
});
const module = await WebAssembly.compile(fs.readFileSync(program));
wasi.start(await WebAssembly.instantiate(module, wasi.getImportObject()));
