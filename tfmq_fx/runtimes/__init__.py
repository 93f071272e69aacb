"""What computes a quantized network: OpenVINO, torch, ONNX, AOTInductor."""
