"""Launches that a training step, a sample call and a scoring pass start on a GPU, counted without one.

``python -m bench.launches [CASE...] [--update [--allow-more REASON]]``

The paper's models run on fake tensors (`bench.fake_gpu`), forward and backward, by the package's own
launchers and autograd. A launch is one ATen op that computes or copies, or one start of a Triton kernel;
views and allocations are none. Some ops start more than one kernel on a device: a convolution with a bias
adds it in a kernel of its own, its backward pass has one for each gradient, and an op on lists of tensors has
one for some dozens of them. The column `device_kernels` counts these; sorts within an indexed sum and
transforms of layouts are in no column. A *training step* is the whole function that training captures,
augmentation, clipping, optimizer and average of the weights included.

Every launch belongs to a class (`classes`): the part of the model whose code asked for it, or for the op
whose backward pass it is; the sums that autograd makes of gradients are a class of their own.
``bench/launches.csv`` holds the counts of each case and class, which are budgets:
`tests/test_launches.py` fails where a class or a case has more. ``--update`` writes the table anew; it raises
a budget only with ``--allow-more`` and a reason, which the table keeps.

`cases` holds what is counted, `counter` counts, `budgets` reads, compares and writes the table.
"""
