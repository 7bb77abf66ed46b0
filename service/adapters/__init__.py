"""The only files that touch ONNX Runtime, SQL, image decoders and metrics libraries."""
