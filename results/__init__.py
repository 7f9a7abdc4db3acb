"""What comes after training: what a model is worth, and what it is handed over as.

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
