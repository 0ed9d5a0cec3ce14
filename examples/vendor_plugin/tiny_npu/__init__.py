"""An invented NPU as a target of hal."""
