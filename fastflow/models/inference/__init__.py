"""Models prepared for scoring: folded constants, engines that run them, and the scorer."""
