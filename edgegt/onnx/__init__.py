"""A trained model as ONNX files: written from a base and a patch, checked, and run by onnxruntime.

Needs the extra `export`. Nothing here is imported unless a command asks for it.
"""
