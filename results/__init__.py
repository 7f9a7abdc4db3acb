"""What comes of a trained model: its figures, and the forms in which it is handed on.

For all
    places       which images are asked for and where results go, refused at once

Evaluation
    evaluation   from a model source to the files
    settings     which data a model is evaluated on, and how its images are prepared
    class_map    which class of a model each class of the data is
    real_labels  the several labels that an image of ImageNet may have
    scores       what a model says of every image, gathered from all ranks
    figures      accuracies, precision, recall, calibration and confusions of these
    report       them as text, JSON and CSV
    charts       them as pictures

Prediction
    prediction   the classes of image files, one after another
    heatmap      Grad-CAM: where a class is seen
    grid         a picture of images with their classes

Export
    exporting    an export from its source to its folder: written, loaded again, compared, put in place
    formats      what each format holds, and what it has no place for
    folders      transformers, timm and torchvision folders, written and loaded
    programs     ONNX and torch.export programs with the preprocessing inside, written and loaded
    sampling     resizing and cropping as products with matrices, in a graph of any image size
    agreement    the images that an export is compared on, and how far it may differ
    card         the model card
    snippets     the code of the card that loads an export
    publishing   sending an export to the Hub
"""
