"""The parts of a run: the step, the state that it changes, and the records of both.

The step
    step         a model and everything that trains it on one device, and the optimiser step
    sources      a trained model, named in the same way wherever one is asked for
    preprocessing the preprocessing that published weights ask for
    weight_files files of weights, .safetensors and .pth
    freezing     a backbone that waits while the classifier learns
    compiling    what of a run torch.compile compiles, where, and where that is kept
    predictor    a model as what comes after a step sees it
    ema          an average of the weights, evaluated beside them
    optim        parameter groups, optimisers, and schedules that count in steps
    losses       cross-entropy and binary cross-entropy, of labels and of mixed targets
    mixing       mixup and cutmix of a step's images and targets
    layers       a table of a model's layers
    lr_curve     reading the curve of a learning rate range test

What is kept
    state        what the next step depends on: captured from a run and restored
    snapshot     the files that hold it: written in the background, verified, pruned
    extension    a run planned longer after it ended
    logs         the run's folder, results.csv, metrics.jsonl, the ledger

Around it
    journal      the records of a run while it trains: logs, snapshots, time and pictures, called by the loop
    console      what a run says while it trains, and its last lines
    signals      how a run is stopped from outside
    timing       where the time of an epoch went; traces of single steps
"""
