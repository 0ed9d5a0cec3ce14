"""Folders of vendors' software: named by what is in them, told where they lack."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from hal.errors import TargetError
from hal.targets import environments
from hal.targets.environments import Environment


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAL_ENVIRONMENTS", str(tmp_path / "environments"))
    return tmp_path / "environments"


def test_environments_are_named_by_what_is_in_them(home: Path) -> None:
    one = Environment(("a==1", "b==2"))
    assert one.folder.parent == home
    assert one.folder == Environment(("b==2", "a==1")).folder
    others = [
        Environment(("a==1",)),
        Environment(("a==1", "b==3")),
        Environment((), ("a==1", "b==2")),
        Environment(("a==1", "b==2"), (), ("c==1",)),
    ]
    assert len({one.folder, *(other.folder for other in others)}) == 5


def test_one_that_is_not_made_is_told() -> None:
    with pytest.raises(TargetError, match="'chip' needs a==1, lib in an environment") as caught:
        Environment(("a==1",), ("lib",)).require("chip")
    assert caught.value.hint == "hal targets setup chip"


def test_of_many_packages_the_first_are_told() -> None:
    many = Environment(("a==1",), tuple(f"lib{i}" for i in range(60)))
    with pytest.raises(TargetError, match="needs a==1, lib0, lib1, lib2 and 57 more in an env"):
        many.require("chip")


def test_packages_that_cannot_be_had_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    wanted = Environment(("no-such-package-of-a-chip==1",))
    said: list[str] = []
    with pytest.raises(TargetError, match=r"pip install .* failed"):
        wanted.make(said.append)
    assert any("no-such-package" in line for line in said)
    assert not wanted.made


def test_one_of_nothing_is_there_already(home: Path) -> None:
    wanted = Environment()
    assert wanted.require("chip") is wanted
    assert wanted.make(lambda _: None) == wanted.folder
    assert not home.exists()


def test_a_suite_has_lists_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(environments, "_KEYRING", keyring)
    ran: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", lambda command, folder=None: ran.append(command))
    environments._download(("a", "b/newer", "c"), tmp_path)
    assert ran[0] == ["apt-get", "download", "a", "c"]
    assert [command[-1] for command in ran[1:]] == ["update", "b"]
    assert f"Dir::State={tmp_path / 'newer' / 'state'}" in ran[1]
    assert (tmp_path / "newer" / "sources.list").read_text().split()[-2:] == ["newer", "main"]


def test_a_suite_whose_keys_are_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environments, "_KEYRING", tmp_path / "no.gpg")
    with pytest.raises(TargetError, match="b of 'newer' cannot be checked") as caught:
        Environment((), ("b/newer",)).make(lambda _: None)
    assert "debian-archive-keyring" in (caught.value.hint or "")


def test_what_stands_alone_is_installed_without_what_it_requires(tmp_path: Path) -> None:
    """A wheel that asks for what nobody has can be installed so, and not otherwise."""
    wheel = tmp_path / "chip_tools-1-py3-none-any.whl"
    facts = {
        "METADATA": "Metadata-Version: 2.1\nName: chip-tools\nVersion: 1\n"
        "Requires-Dist: no-such-package-of-a-chip\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("chip_tools.py", "answer = 42\n")
        for name, text in facts.items():
            file.writestr(f"chip_tools-1.dist-info/{name}", text)
    wanted = Environment((), (), (str(wheel),))
    wanted.make(lambda _: None)
    assert wanted.made
    command = [str(wanted.python), "-c", "import chip_tools; print(chip_tools.answer)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "42\n"


def _installed(wanted: Environment, version: str) -> Path:
    """An environment with a package of one file, as pip leaves it; the file."""
    site = wanted.folder / "venv" / "lib" / "python3" / "site-packages"
    facts = site / f"chip_sdk-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: chip-sdk\nVersion: {version}\n")
    (facts / "RECORD").write_text("chip_sdk/tool,,\nchip_sdk/__pycache__/tool.pyc,,\n")
    tool = site / "chip_sdk" / "tool"
    tool.parent.mkdir()
    tool.touch()
    wanted.python.parent.mkdir(parents=True)
    wanted.python.touch()
    (wanted.folder / "made.json").touch()
    return tool


def test_another_version_than_it_was_made_with_is_told() -> None:
    wanted = Environment(("chip-sdk[all]==1.5",))
    _installed(wanted, "1.4")
    with pytest.raises(TargetError) as caught:
        wanted.require("chip")
    assert "'chip' wants chip-sdk[all]==1.5 and has 1.4" in caught.value.message
    assert caught.value.hint == "hal targets setup chip"


def test_a_build_of_the_same_version_is_no_other_version() -> None:
    wanted = Environment(("chip-sdk==1.5",))
    _installed(wanted, "1.5+cpu")
    assert wanted.require("chip") is wanted


def test_setting_up_makes_a_damaged_one_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, ran, said = Environment(("chip-sdk==1.5",)), list[list[str]](), list[str]()
    tool = _installed(wanted, "1.5")
    monkeypatch.setattr(environments, "_run", lambda command, folder=None: ran.append(command))
    wanted.make(said.append)
    assert (ran, said) == ([], [])
    tool.unlink()
    wanted.make(said.append)
    assert said[0] == "it lacks chip_sdk/tool of chip-sdk==1.5: making it anew"
    assert [command[2] for command in ran] == ["venv", "pip"]
    assert wanted.made
