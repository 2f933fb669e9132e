"""One level as a plain model that works without nestify: timm weights, ONNX, or torch's own pt2.

Inputs are images preprocessed as timm does (the file says how); outputs are logits, without a softmax.
"""
