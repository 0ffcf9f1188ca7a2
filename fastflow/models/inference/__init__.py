"""Models prepared for scoring: constants folded out of their parameters, engines that run them, and the
scorer.
"""
