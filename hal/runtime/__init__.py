"""Running bundles: sessions, generation, verification, samples."""
