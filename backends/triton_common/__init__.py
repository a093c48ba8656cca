"""What our Triton backends share: device features, compiler internals, fast launches, replay."""
