"""Trackers: where the numbers and pictures of a run go besides its own folder.

Trackers
    choices      the registry of --track, what a tracker is, and which can be used here
    clients      TensorBoard, Weights & Biases, trackio and MLflow
    runner       a thread for each tracker of a run, for which training never waits
"""
