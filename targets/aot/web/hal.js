// A compiled model as a WebAssembly program: loaded once, run as often as you like.
//
//   import { load } from "./hal.js";
//   const model = await load(".");                    // the folder of model.json
//   const { y } = await model.run({ x: new Float32Array(64) });
//
// Tensors are typed arrays, dense and in row-major order; `model.inputs` and `model.outputs` say
// which: [{ name, dtype, shape }]. bool is a Uint8Array of 0 and 1, int64 a BigInt64Array.

const ARRAYS = {
  bool: Uint8Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array,
  int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  float16: globalThis.Float16Array, float32: Float32Array, float64: Float64Array,
};
const FORMAT = 1;
const BAD_DESCRIPTOR = 8; // of WASI
const WARM_UP = 500; // milliseconds

/**
 * Load the model of a folder that `hal page` wrote; its weights are read once, here.
 *
 * @param {string | URL} folder relative to the page, or a whole URL
 * @returns {Promise<Model>}
 * @throws {Error} a file is missing, cut off or of a newer format; the browser lacks something
 */
export async function load(folder = ".") {
  const base = globalThis.document?.baseURI ?? globalThis.location?.href;
  const place = new URL(String(folder).replace(/\/?$/, "/"), base);
  const about = await (await got(new URL("model.json", place))).json();
  if (about.format !== FORMAT) throw new Error(`model.json has format ${about.format}, not ${FORMAT}`);
  for (const { name, dtype } of [...about.inputs, ...about.outputs])
    if (!ARRAYS[dtype]) throw new Error(`'${name}' is ${dtype}, which this browser has no array of`);
  const program = await (await got(new URL(about.program.file, place))).arrayBuffer();
  const instance = await started(await WebAssembly.compile(program));
  const memory = instance.exports.memory;
  const start = instance.exports.hal_weights() >>> 0;
  const { file, bytes } = about.weights;
  let read = 0;
  const reader = bytes ? (await got(new URL(file, place))).body.getReader() : null;
  for (let part; reader && !(part = await reader.read()).done; read += part.value.length) {
    if (read + part.value.length > bytes) throw new Error(`${file} has more than ${bytes} bytes`);
    new Uint8Array(memory.buffer, start + read, part.value.length).set(part.value);
  }
  if (read !== bytes) throw new Error(`${file} has ${read} bytes, not ${bytes}: it is cut off`);
  return new Model(about, instance.exports);
}

/** A loaded model. Calls run one after the other, in the thread that makes them. */
export class Model {
  #exports;
  #failed = "";

  /** Use `load`. */
  constructor(about, exports) {
    this.#exports = exports;
    /** @type {string} */
    this.name = about.name;
    /** @type {{name: string, dtype: string, shape: number[]}[]} */
    this.inputs = about.inputs;
    /** @type {{name: string, dtype: string, shape: number[]}[]} */
    this.outputs = about.outputs;
    /** Bytes that were loaded. */
    this.size = { program: about.program.bytes, weights: about.weights.bytes };
  }

  /** Bytes of memory that the program has now, weights included. */
  get memory() {
    return this.#exports.memory.buffer.byteLength;
  }

  /**
   * Run once.
   *
   * @param {Object<string, ArrayBufferView>} feeds a typed array for every input
   * @returns {Promise<Object<string, ArrayBufferView>>} a new typed array for every output
   * @throws {Error} an input is missing, unknown, of another type or length; the program failed
   */
  async run(feeds) {
    this.#fill(feeds);
    this.#call();
    return Object.fromEntries(
      this.outputs.map((port, i) => [port.name, this.#view(port, this.#exports.hal_output(i)).slice()]),
    );
  }

  /**
   * Milliseconds that a call takes once it is warm: the median of `rounds`, each of so many calls
   * that the clock can tell.
   *
   * @returns {Promise<{median: number, least: number, rounds: number, calls: number}>}
   * @throws {Error} as `run`
   */
  async time(feeds, rounds = 20) {
    const round = (calls) => {
      const start = performance.now();
      for (let i = 0; i < calls; i++) {
        this.#fill(feeds);
        this.#call();
      }
      return performance.now() - start;
    };
    // Engines compile what runs often a second time, and better, while it runs.
    for (const start = performance.now(); performance.now() - start < WARM_UP; ) {
      round(1);
      await pause();
    }
    let calls = 1; // browsers round their clock, some to a millisecond
    while (round(calls) < 10) calls *= 2;
    const found = [];
    for (let i = 0; i < rounds; i++) {
      await pause(); // the page answers meanwhile
      found.push(round(calls) / calls);
    }
    found.sort((a, b) => a - b);
    const middle = found.length >> 1;
    const median = found.length % 2 ? found[middle] : (found[middle - 1] + found[middle]) / 2;
    return { median, least: found[0], rounds, calls };
  }

  #fill(feeds) {
    for (const name of Object.keys(feeds))
      if (!this.inputs.some((port) => port.name === name))
        throw new Error(`there is no input '${name}'; there is ${this.inputs.map((p) => p.name).join(", ")}`);
    this.inputs.forEach((port, i) => {
      const view = this.#view(port, this.#exports.hal_input(i)), array = feeds[port.name];
      const wanted = `${view.constructor.name} of ${view.length}`;
      if (!array) throw new Error(`input '${port.name}' is missing: ${wanted}`);
      if (array.constructor?.name !== view.constructor.name || array.length !== view.length)
        throw new Error(`input '${port.name}' is ${array.constructor?.name} of ${array.length}, not ${wanted}`);
      view.set(array);
    });
  }

  #call() {
    if (this.#failed) throw new Error(`the program has failed before: ${this.#failed}`);
    try {
      this.#exports.hal_run();
    } catch (error) {
      this.#failed = error.message;
      throw error;
    }
  }

  // Made anew for each use: a view ends when the memory grows.
  #view({ dtype, shape }, address) {
    return new ARRAYS[dtype](this.#exports.memory.buffer, address >>> 0, length(shape));
  }
}

/** An array of zeros for an input, to be filled. */
export const emptyArray = ({ dtype, shape }) => new ARRAYS[dtype](length(shape));

const pause = () => new Promise((next) => setTimeout(next));
const length = (shape) => shape.reduce((a, b) => a * b, 1);

async function got(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url.pathname}: ${response.status} ${response.statusText}`);
  return response;
}

// The C library asks its host for files, of which there are none here, and tells why it gives up.
async function started(module) {
  const imports = {};
  for (const { module: space, name } of WebAssembly.Module.imports(module))
    (imports[space] ??= {})[name] = () => BAD_DESCRIPTOR;
  const wasi = (imports.wasi_snapshot_preview1 ??= {});
  let told = "", instance = null;
  wasi.fd_write = (_, vectors, count, written) => {
    const view = new DataView(instance.exports.memory.buffer);
    let total = 0;
    for (let i = 0; i < count; i++) {
      const size = view.getUint32(vectors + 8 * i + 4, true);
      const text = new Uint8Array(view.buffer, view.getUint32(vectors + 8 * i, true), size);
      told += new TextDecoder().decode(text);
      total += size;
    }
    view.setUint32(written, total, true);
    return 0;
  };
  wasi.proc_exit = (code) => {
    throw new Error(told.trim() || `the program ended with ${code}`);
  };
  instance = await WebAssembly.instantiate(module, imports);
  instance.exports.hal_start();
  return instance;
}
