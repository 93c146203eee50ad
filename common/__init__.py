"""What a reader reads, and lessons share: the networks, the diffusion process, the image model, the loop."""
