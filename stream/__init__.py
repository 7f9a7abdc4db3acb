"""The path of an image from the Hub to a batch on the device. Nothing here knows the program's settings.

What is read
    dataset      HuggingFaceImageNetDataset: a split in blocks, on the Hub or on disk, and the reader of an epoch
    order        which sample comes when: a pure function of seed and epoch
    seeds        where random numbers come from, separate for each use
    parquet      files of images and labels, read in blocks of row groups
    webdataset   tar shards of images and labels
    local        images in memory or in files: digits, CIFAR, image folders
    synthetic    generated images to try things on

How it gets here
    hub          files on the Hub at one commit, and ranges of their bytes
    retry        what is retried and for how long; what the Hub's refusals mean
    cache        bytes that processes share on one disk
    blocks       images and labels as one run of bytes, in memory that goes back to the system
    files        files that are either complete or absent

How it becomes a batch
    loader       StreamingDataLoader: batches in the order of an epoch
    resident     ResidentLoader: a small dataset in the device's memory
    decode_pool  processes that decode and transform
    images       encoded images -> transformed pixels
    jpeg         regions of JPEGs
    augment      augmentation of whole batches on the device
"""
