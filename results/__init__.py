"""What comes after training: from a model source to figures, predictions and exports.

Prediction
    prediction   the classes of image files, one after another
    heatmap      Grad-CAM: where a class is seen
    grid         a picture of images with their classes
"""
