"""One file a form: `.pt`, `.safetensors`, and the folders that host libraries write."""
