from pathlib import Path

import pytest

from hal.descriptor import Descriptor, merge, parse
from hal.targets import Registry
from hal.targets.detect import Cache, Machine, detect, host_table

V3 = [
    "avx",
    "avx2",
    "bmi1",
    "bmi2",
    "f16c",
    "fma",
    "abm",
    "movbe",
    "xsave",
    "popcnt",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "cx16",
]
V4 = [*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]


def library() -> list[Descriptor]:
    registry = Registry.discover("")
    return [registry.descriptor(name) for name in registry.names() if name != "host"]


def machine(architecture: str, features: list[str], cores: int = 4) -> Machine:
    return Machine(architecture, "some model", cores, frozenset(features), 2**34)


@pytest.mark.parametrize(
    ("architecture", "features", "parent"),
    [
        ("x86_64", [], "x86-64"),
        ("x86_64", V3, "x86-64-v3"),
        ("AMD64", V3, "x86-64-v3"),
        ("x86_64", V3[1:], "x86-64"),
        ("x86_64", [*V4, "avx512_vnni"], "x86-64-v4"),
        ("aarch64", ["asimd"], "aarch64"),
        ("riscv64", [], "cpu"),
        ("riscv64", ["v"], "rv64gcv"),
        ("s390x", ["vx"], "cpu"),
    ],
)
def test_the_host_extends_the_best_level_it_fully_has(
    architecture: str, features: list[str], parent: str
) -> None:
    assert host_table(library(), machine(architecture, features))["extends"] == parent


def test_optional_instructions_come_with_the_machines_features() -> None:
    table = host_table(library(), machine("x86_64", [*V4, "avx512_vnni", "rtm"]))
    assert table["features"] == ["avx512_vnni"]
    assert not {"instructions", "routes"} & table.keys()  # they come from the library
    parent = Registry.discover("").descriptor("x86-64-v4").to_dict()
    host = parse(merge(parent, table))
    assert {"+avx512f", "+avx512vnni"} <= set(host.llvm_features())
    assert not {"+avx512bf16", "+amx-int8"} & set(host.llvm_features())
    assert {i.lanes for i in host.offered() if i.types == ("u8", "i8", "i32")} == {4, 8, 16}


def test_a_machine_that_nothing_describes_still_has_both_routes() -> None:
    host = parse(host_table([], machine("s390x", [])))
    assert list(host.routes) == ["onnxruntime", "tvm"]
    assert host.route()[0] == "onnxruntime"
    assert host.memory_bandwidth() is None


def test_detection_is_the_same_from_run_to_run() -> None:
    first, second = Registry.discover(""), Registry.discover("")
    assert first.descriptor("host").digest() == second.descriptor("host").digest()


def fake_system(root: Path, *, quota: str, siblings: str) -> Path:
    cpu = root / "sys/devices/system/cpu/cpu0"
    files = {
        root / "proc/cpuinfo": "model name : Fake 9000\nflags : fma avx\n\nmodel name : other\n",
        root / "proc/meminfo": "MemTotal: 1024 kB\nMemFree: 1 kB\n",
        root / "sys/fs/cgroup/cpu.max": quota,
        cpu / "topology/thread_siblings_list": siblings,
        cpu / "cache/index0/type": "Data",
        cpu / "cache/index0/level": "1",
        cpu / "cache/index0/size": "32K",
        cpu / "cache/index0/coherency_line_size": "64",
        cpu / "cache/index0/shared_cpu_list": "0-1",
        cpu / "cache/index1/type": "Instruction",
        cpu / "cache/index1/level": "1",
        cpu / "cache/index1/size": "32K",
        cpu / "cache/index2/type": "Unified",
        cpu / "cache/index2/level": "2",
        cpu / "cache/index2/size": "8M",
        cpu / "cache/index2/shared_cpu_list": "0-3,8",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_operating_systems_files_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hal.targets.detect._usable_cpus", lambda: {0})
    found = detect(fake_system(tmp_path, quota="max 100000", siblings="0,1"))
    assert found.model == "Fake 9000"
    assert found.features == {"fma", "avx"}
    assert found.memory_bytes == 2**20
    assert found.caches == (Cache("l1d", 2**15, 64, 2), Cache("l2", 2**23, None, 5))


@pytest.mark.parametrize(
    ("cpus", "quota", "siblings", "cores"),
    [
        ({0}, "max 100000", "0", 1),
        ({0, 1}, "max 100000", "0", 2),
        ({0, 1, 2, 3}, "200000 100000", "0", 2),
        ({0, 1, 2}, "50000 100000", "0", 1),
    ],
)
def test_cores_are_those_that_affinity_and_quota_leave(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpus: set[int],
    quota: str,
    siblings: str,
    cores: int,
) -> None:
    monkeypatch.setattr("hal.targets.detect._usable_cpus", lambda: cpus)
    assert detect(fake_system(tmp_path, quota=quota, siblings=siblings)).cores == cores


def test_two_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hal.targets.detect._usable_cpus", lambda: {0, 1})
    root = fake_system(tmp_path, quota="max 100000", siblings="0-1")
    twin = root / "sys/devices/system/cpu/cpu1/topology/thread_siblings_list"
    twin.parent.mkdir(parents=True)
    twin.write_text("0-1")
    assert detect(root).cores == 1


def test_features_in_one_word_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor: 0\nisa : rv64imafdcv_zicbom_zvqdotq\n")
    assert detect(tmp_path).features == {*"imafdcv", "zicbom", "zvqdotq"}


def test_a_machine_without_these_files_is_still_described(tmp_path: Path) -> None:
    found = detect(tmp_path)
    assert found.cores >= 1
    assert found.memory_bytes is None
    assert found.caches == ()
