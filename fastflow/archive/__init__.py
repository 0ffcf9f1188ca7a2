"""Work on archives of many files: training on one, classification, explanation and samples."""
