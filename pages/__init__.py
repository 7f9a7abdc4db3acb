"""What a run leaves in its folder, read back, and the parts of HTML pages that show it, without torch.

Reading
    history      the settings, launches, epochs and steps of a run, from its logs
    names        class and file names, shortened for a picture or a line

Showing
    markup       text, tables and the frame of a page as HTML, all of it escaped
    svg          line charts
"""
