"""The path of an image from the Hub to a batch on the device. Nothing here knows the program's settings.

What is read
    dataset      HuggingFaceImageNetDataset: a split in blocks, on the Hub or on disk
    block_reader BlockReader: the blocks of an epoch, fetched some way ahead of use
    parquet      files of images and labels, read in blocks of row groups
    chunks       column chunks of parquet files, read in ranges
    footers      the footers of parquet files, read in parallel and parsed when they are asked for
    row_groups   what is held of all footers: where row groups lie, and what is told of their labels
    outside      images that a parquet file tells only the paths of
    webdataset   tar shards of images and labels
    samples      which members of a tar shard make a sample
    other_formats sets in other forms, which are downloaded first: folders and zips of images, or tables
    tables       Arrow, csv and json files of images or their paths
    image_table  images that are read one by one
    local        images in memory or in files: digits, CIFAR
    image_folders which files of a folder are images, and of which class
    synthetic    generated images to try things on

What it means
    data_files   which files of a dataset hold its data
    clutter      files that are no data
    folders      what the paths of images tell
    columns      which columns hold images and labels
    label_column the labels of parquet files, and the classes that they tell of
    labels       how labels as they are stored become numbers of classes
    inventory    the names of a set's files, so that a resume can tell what changed

How it gets here
    hub          what a dataset on the Hub has at one commit
    ranges       files read in ranges; what the Hub answers is checked
    pages        the page structure of a parquet column, compared with the footer
    client       the HTTP client that the Hub's libraries share: no wait without a bound
    retry        waiting for the network: for how long, and what to say meanwhile
    allowance    how fast the Hub may be asked
    reach        whether the Hub can be reached, takes the token and lets a dataset be read
    explain      what errors mean, in one line that says what to do
    cache        bytes that processes share on one disk
    filling      blocks kept there ahead of training
    blocks       images and labels as one run of bytes, in memory that goes back to the system
    files        files that are either complete or absent

How it becomes a batch
    order        which sample comes when: a pure function of seed and epoch
    seeds        where random numbers come from, separate for each use
    picks        a fair sample of a set, and the share held out for validation
    source       what a loader needs of a dataset
    loader       StreamingDataLoader: batches in the order of an epoch
    resident     ResidentLoader: a small dataset in the device's memory
    decode_pool  processes that decode and transform
    shared       memory that they share with the loader: batches, and files of a cache
    transfer     batches on their way to the device
    images       encoded images -> resized and transformed pixels
    pipelines    what is done to each image, by name: built where images are
    transforms   steps of albumentations, and how a pipeline of them is seeded
    pictures     encoded images -> pixels, by one rule for all formats
    formats      which files are images, and how large they may be
    kept         what a cache keeps of an image: a smaller one
    planes       images as planes of brightness and halved colours, as a cache may keep them
    jpeg         JPEGs and regions of them, and whether their data are sound
    augment      augmentation of whole batches on the device: flip, crop, cutout, normalisation
    auto_augment TrivialAugmentWide and RandAugment of whole batches
    policies     how these are named
    jitter       random changes of colour of whole batches
    erasing      random erasing of boxes of whole batches
    operations   the operations that these are made of, and their numbers
    image_ops    what torchvision does to images, for groups of them
    pillow_ops   what Pillow does to images, for groups of them
"""
