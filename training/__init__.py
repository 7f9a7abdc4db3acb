"""What a run is made of: the step, the state that it changes, and what is kept of both.

The step
    step         a model with what trains it on one device, and the optimiser step
    optim        parameter groups, optimisers, and schedules that count in steps
    lr_curve     reading the curve of a learning rate range test

What is kept
    state        what the next step depends on, taken out of a run and put back
    snapshot     the files that hold it: written in the background, verified, pruned
    logs         the run's folder, the console, results.csv, metrics.jsonl, the ledger

Around it
    journal      what a run keeps of itself while it goes: all of the above, called by the loop
    signals      how a run is stopped from outside
    timing       where an epoch's time went; traces of single steps
"""
