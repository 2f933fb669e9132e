"""One level as a plain model that needs no nestify: timm weights, ONNX, or torch's own pt2.

Pictures come in as timm prepares them (the file says how), logits come out, without a softmax.
"""
