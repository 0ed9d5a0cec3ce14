"""Speed side by side with other runtimes; see ``benchmarks/run.py``.

::

    shapes.py       models by their configurations      contenders.py  who runs what, in which cell
    venvs.py        environments of peers               artifacts.py   files that contenders load
    worker.py       a contender's process, seen from here (the other side: workers/)
    measure.py      rounds in turns, spoiled samples    store.py       results on disk, for --resume
    goals.py        met or missed                       report.py      RESULTS.md
"""
