"""Files on a disk, without a model: durable writing, safetensors as a stream."""
