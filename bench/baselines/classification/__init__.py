"""Classifiers that stand beside the flow: same folds, augmentation, class balance and budget.

``python -m bench.baselines.classification NAME MANIFEST --fold 0 --seed 0 --images 20000 --out DIR`` trains
one; ``python -m bench.baselines.classification table DIR`` makes one table of all results. ``docs/rivals.md``
has the protocol.
"""
