"""A GPU in eight minutes: errors, images/s, bits of captured steps, kernels, memory.

``python -m bench.gpu [--preset paper] [--seconds 480] [--classes 7] [EXPORT...]``

Items run in order of importance until the time is up; what is left is named. Every figure is printed as it
comes and goes into ``bench/gpu.csv``, which is written whole after each row; a row of the same device,
versions, preset, task, engine, precision and batch takes the place of the old one. Rates are medians of calls
that were waited for. `docs/gpu.md` says what each figure means.

Without a GPU a small preset runs on the CPU, which tests the script; nothing is measured or written then.

`report` keeps the time and the table, `setting` builds models, `checks` compares numbers, `speed` times
models, `ops` single kernels, `exports` ONNX Runtime.
"""
