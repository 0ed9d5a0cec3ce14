"""What :func:`hal.evaluate` does: reads and checks texts, tokens and inputs; runs builds; scores.

The figures and their intervals are in :mod:`hal.runtime.scoring`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hal.bundle.bundle import Bundle, load
from hal.errors import InputError
from hal.runtime import scoring
from hal.runtime.scoring import Estimate, OutputScore, OutputTally, Progress, TextScore
from hal.runtime.session import Session, is_whole
from hal.runtime.tokenizer import TOKENIZER_FILE, Tokenizer

DEFAULT_WINDOW = 512
_BATCH = 16
_NOT_A_LANGUAGE_MODEL = "give --inputs FILE.npz (in Python: inputs=…) for other models"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        target: the build that was scored.
        against: the reference's path, and
        against_target: its build.
        window: tokens that were predicted in one go (language models).
        text: figures of a language model.
        examples: number of examples (other models).
        outputs: figures of each output beside the reference's.
        accuracy: share of examples whose largest element is at the label.
        reference_accuracy: the reference's.
    """

    target: str
    against: str | None = None
    against_target: str | None = None
    window: int | None = None
    text: TextScore | None = None
    examples: int | None = None
    outputs: Mapping[str, OutputScore] | None = None
    accuracy: Estimate | None = None
    reference_accuracy: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries; figures that were not asked for are left out."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: scoring.to_json(v) for name, v in fields.items() if v is not None}


def evaluate(
    bundle: Bundle | str | Path,
    *,
    text: str | None = None,
    tokens: Any = None,
    inputs: Mapping[str, Any] | str | Path | None = None,
    labels: Any = None,
    against: Bundle | str | Path | None = None,
    target: str | None = None,
    against_target: str | None = None,
    window: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a bundle on data, alone or against another bundle of the same model.

    A language model gets ``text`` or ``tokens``: perplexity, and against a reference the
    Kullback-Leibler divergence of its predictions and how often both would say the same. Other
    models get ``inputs``: cosine and errors of the outputs against a reference, accuracy with
    ``labels``. Every mean comes with a 95 % interval (how: :mod:`hal.runtime.scoring`).

    Args:
        bundle: what is scored: a bundle, or its path.
        text: a text, which the bundle's tokenizer reads.
        tokens: token ids ``[n]``, or the path of a ``.npy`` with them.
        inputs: arrays by input name with the examples along the first axis, or the path of an
            ``.npz`` with them.
        labels: the right class of each example, ``[examples]``, or the path of a ``.npy``.
        against: the reference. Its build is ``against_target``; default: ``target`` if it has that.
        target: which build is scored; default: the best one here.
        against_target: which build of the reference.
        window: tokens predicted in one go; default: 512, or the model's positions if fewer.
        threads: of both sessions; default: all usable cores.
        progress: called with the number of windows or batches done, and of all.

    Raises:
        InputError: not exactly one of ``text``, ``tokens`` and ``inputs``; no such file, or not
            what it should be; no tokenizer for a text; nothing to predict; tokens out of the
            vocabulary; two models with different vocabularies or outputs; nothing to compare with.
        CheckFailed: a model gives results that are not numbers.
        BundleError, TargetError: as :func:`hal.load` and :meth:`Bundle.session`.
    """
    if sum(given is not None for given in (text, tokens, inputs)) != 1:
        raise InputError(
            "an evaluation takes exactly one of text, tokens and inputs",
            "text or tokens for a language model, inputs for others",
        )
    bundle = bundle if isinstance(bundle, Bundle) else load(bundle)
    reference = against if isinstance(against, Bundle) or against is None else load(against)
    if reference is None and against_target is not None:
        reference = bundle
    if inputs is None:
        _check_language_models(bundle, reference, labels)
    elif window is not None:
        raise InputError("a window is for language models", "leave it out")
    with _sessions(bundle, target, reference, against_target, threads) as (ours, theirs):
        found = Evaluation(
            ours.target,
            str(theirs.bundle.path) if theirs else None,
            theirs.target if theirs else None,
        )
        if inputs is None:
            ids, prefix = _token_ids(bundle, reference, text, tokens)
            size = _window(bundle, reference, window, len(prefix))
            score = scoring.score_text(
                ours, ids, window=size, against=theirs, prefix=prefix, progress=progress
            )
            return dataclasses.replace(found, window=size, text=score)
        return _score_outputs(ours, theirs, inputs, labels, found, progress)


@contextlib.contextmanager
def _sessions(
    bundle: Bundle,
    target: str | None,
    reference: Bundle | None,
    reference_target: str | None,
    threads: int | None,
) -> Iterator[tuple[Session, Session | None]]:
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(bundle.session(target, threads=threads))
        if reference is None:
            yield ours, None
            return
        if reference_target is None and ours.target in reference.targets:
            reference_target = ours.target
        session = reference.session(reference_target, threads=threads)
        yield ours, stack.enter_context(session)


def _check_language_models(bundle: Bundle, reference: Bundle | None, labels: Any) -> None:
    if labels is not None:
        raise InputError("labels are for models that are given inputs", "leave them out")
    for one in (bundle, reference):
        if one is not None and one.manifest.task != "causal-lm":
            raise InputError(
                f"{one.path} is no language model: its task is {one.manifest.task!r}",
                _NOT_A_LANGUAGE_MODEL,
            )
    if reference is None:
        return
    sizes = [one.manifest.metadata.get("vocab_size") for one in (bundle, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise _different_vocabularies(bundle, reference, f"{sizes[0]} and {sizes[1]} tokens")


def _different_vocabularies(bundle: Bundle, reference: Bundle, how: str) -> InputError:
    return InputError(
        f"{bundle.path} and {reference.path} have different vocabularies: {how}",
        "compare models that share a tokenizer; perplexity alone needs no --against",
    )


def _token_ids(
    bundle: Bundle, reference: Bundle | None, text: str | None, tokens: Any
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The tokens, int64 ``[n]``, and those that every window begins with."""
    if text is None:
        ids = _read_integers(tokens, "tokens")
        prefix: tuple[int, ...] = ()
    else:
        if not text.strip():
            raise InputError("the text is empty", "give a text of a few hundred words or more")
        ids, prefix = _encode(bundle, text)
        if reference is not None and TOKENIZER_FILE in reference.files:
            others, _ = _encode(reference, text)
            if not np.array_equal(ids, others):
                raise _different_vocabularies(bundle, reference, "they cut the text differently")
    if len(ids) + len(prefix) < 2:
        raise InputError(
            f"{len(ids)} token(s) leave none to predict", "give a text of two tokens or more"
        )
    size = bundle.manifest.metadata.get("vocab_size")
    wrong = (ids < 0) | (ids >= (size or np.iinfo(np.int64).max))
    if wrong.any():
        place = int(np.argmax(wrong))
        vocabulary = f": the vocabulary is 0..{size - 1}" if size else ""
        raise InputError(
            f"token {place} is {int(ids[place])}{vocabulary}", "use the model's own tokenizer"
        )
    return ids, prefix


def _encode(bundle: Bundle, text: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Ids without special tokens, and the beginning-of-text token if the tokenizer puts one."""
    tokenizer = Tokenizer.from_bundle(bundle.files)
    begin = bundle.manifest.metadata.get("bos_token_id")
    if begin is not None and tokenizer.encode("a")[:1] != [begin]:
        begin = None
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)
    return ids, () if begin is None else (int(begin),)


def _window(bundle: Bundle, reference: Bundle | None, window: int | None, prefix: int) -> int:
    """Tokens of a window: as asked for, or as many as are usual and fit.

    What is fed is one token less than context and window together.
    """
    known = [one.manifest.metadata.get("max_positions") for one in (bundle, reference) if one]
    room = min((positions for positions in known if positions), default=None)
    most = None if room is None else room - max(0, prefix - 1)
    if window is None:
        return min(DEFAULT_WINDOW, most or DEFAULT_WINDOW)
    if not is_whole(window) or window < 1:
        raise InputError(f"window={window!r} is no length", "give a whole number from 1")
    if most is not None and window > most:
        raise InputError(
            f"a window of {window} tokens is asked for, the model has {room} positions",
            f"give {most} or fewer",
        )
    return window


def _read_integers(given: Any, what: str) -> np.ndarray:
    """A list of integers, int64 ``[n]``.

    Raises:
        InputError: no such file, not a ``.npy``, not integers, not one row of them.
    """
    name = what
    if isinstance(given, str | Path):
        name, given = str(given), read_numpy(Path(given), "a .npy file of integers")
    if isinstance(given, np.lib.npyio.NpzFile):
        given.close()
        raise InputError(f"{name} is an .npz, not a .npy of integers", "save it with numpy.save")
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise InputError(f"{name} is no array: {error}", "give one row of integers") from error
    if array.dtype.kind not in "iu":
        raise InputError(
            f"{name} holds {array.dtype}, not integers", "save it with an integer dtype"
        )
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {list(array.shape)}, not [n]", "give one row")
    if not len(array):
        raise InputError(f"{name} is empty", f"give some {what}")
    return array.astype(np.int64)


def read_numpy(path: Path, wanted: str) -> Any:
    """What ``numpy.load`` gives; nothing is unpickled.

    Raises:
        InputError: there is no such file, or it is not ``wanted``.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file", "check the path")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        # numpy takes what it cannot read for a pickle, and proposes to load it unsafely.
        raise InputError(f"{path} is not {wanted}", "save numbers with numpy") from error


def _score_outputs(
    ours: Session,
    theirs: Session | None,
    inputs: Mapping[str, Any] | str | Path,
    labels: Any,
    found: Evaluation,
    progress: Progress | None,
) -> Evaluation:
    if ours.states:
        raise InputError(
            f"{ours.bundle.path} carries state from call to call",
            "give --text or --tokens (in Python: text=… or tokens=…)",
        )
    if theirs is None and labels is None:
        raise InputError(
            "there is nothing to compare the outputs with",
            "give --against BUNDLE or --labels FILE.npy (in Python: against=… or labels=…)",
        )
    arrays = _read_arrays(inputs)
    truth = None if labels is None else _read_integers(labels, "labels")
    cuts = _batches(ours, arrays)
    count = cuts[-1].stop
    if truth is not None and len(truth) != count:
        raise InputError(f"{len(truth)} labels for {count} examples", "give one for each")
    tallies = {spec.name: OutputTally(spec.name) for spec in ours.outputs}
    hits: list[list[np.ndarray]] = [[], []]
    for done, cut in enumerate(cuts, 1):
        feeds = {name: array[cut] for name, array in arrays.items()}
        results = [session.run(feeds) for session in (ours, theirs) if session]
        for name, tally in tallies.items():
            if theirs:
                tally.add(*_pair(name, results))
        for kept, result in zip(hits, results, strict=False):
            if truth is not None:
                kept.append(_hits(result[ours.outputs[0].name], truth[cut]))
        if progress:
            progress(done, len(cuts))
    shares = [scoring.accuracy(np.concatenate(kept)) if kept else None for kept in hits]
    outputs = {name: tally.score() for name, tally in tallies.items()} if theirs else None
    return dataclasses.replace(
        found,
        examples=count,
        outputs=outputs,
        accuracy=shares[0],
        reference_accuracy=shares[1],
    )


def _read_arrays(inputs: Mapping[str, Any] | str | Path) -> dict[str, np.ndarray]:
    if isinstance(inputs, Mapping):
        return {name: np.asarray(array) for name, array in inputs.items()}
    wanted = "an .npz of arrays by input name"
    loaded = read_numpy(Path(inputs), wanted)
    if isinstance(loaded, np.ndarray):
        raise InputError(f"{inputs} is a .npy, not {wanted}", "save it with numpy.savez")
    with loaded:
        try:
            return {name: loaded[name] for name in loaded.files}
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{inputs} is not {wanted}: {error}", "save it with numpy") from error


def _batches(session: Session, arrays: Mapping[str, np.ndarray]) -> list[slice]:
    """Cuts of the first axis that the model can take: its own extent, or a few at a time.

    Raises:
        InputError: arrays differ in length, are empty, or cannot be cut so.
    """
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"the inputs have different numbers of examples: {lengths}",
            "give every input the same first axis",
        )
    count = max(lengths.values(), default=0)
    if not count:
        raise InputError("the inputs hold no example", "give one or more")
    fixed = {spec.dims[0] for spec in session.inputs if spec.dims and isinstance(spec.dims[0], int)}
    size = int(min(fixed)) if fixed else _BATCH
    if fixed and count % size:
        raise InputError(
            f"{count} examples do not fill batches of {size}, which the model takes",
            f"give a multiple of {size}",
        )
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _pair(name: str, results: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    if name not in results[1]:
        raise InputError(
            f"the reference has no output {name!r} (it has {', '.join(results[1])})",
            "compare two builds of one model",
        )
    return np.asarray(results[0][name]), np.asarray(results[1][name])


def _hits(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if output.ndim != 2:
        raise InputError(
            f"labels need an output [examples, classes], the first is {list(output.shape)}",
            "leave the labels out",
        )
    if labels.min() < 0 or labels.max() >= output.shape[1]:
        raise InputError(f"a label is not in 0..{output.shape[1] - 1}", "number the classes from 0")
    hits: np.ndarray = output.argmax(-1) == labels
    return hits
