"""Run or export a quantized network: OpenVINO, torch, ONNX, AOTInductor."""
