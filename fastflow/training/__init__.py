"""Training: objectives, augmentation, the loop and calibration."""
