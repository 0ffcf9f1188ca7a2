"""The lint finds what a CUDA graph cannot hold of a training step: ``python -m bench.capture_lint``, no GPU.

A function that would be captured runs on fake tensors (`bench.fake_gpu`) under `lint.CaptureLint`, which
names file and line of

- every wait of the host: a value of the device that Python asks for, `torch.cuda.synchronize`;
- every copy that blocks: from the device, or from memory of the host that is not page-locked;
- every shape that values decide (`nonzero`, a mask as an index);
- every random number that the host draws, and every number of the host that the optimizer gets by value: a
  replay would repeat them.

The command lints the function that `fastflow.training.step.TrainingStep` captures, for both tasks and all
objectives, in float32 and under autocast, and in the reversible mode. It sees no waits within libraries, no
loads of kernels (a warm-up does those), no tables of addresses and no checks of label indices (both pass over
fake tensors), no stale streams.
"""
