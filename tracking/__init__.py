"""Trackers: where the numbers and pictures of a run go besides its own folder.

Trackers
    tracker      what a tracker is, and whether it can be used here
    clients      TensorBoard, Weights & Biases, trackio and MLflow
    runner       a thread for each tracker of a run, for which training never waits
"""
