"""DICOM: which files make up a scan or sequence, and their volumes."""
