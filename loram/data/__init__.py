"""Text in: formats, templates, loss masks, batches and calibration windows."""
