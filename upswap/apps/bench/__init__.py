"""What upsamplers, and models with other upsamplers in them, cost: the measuring behind `upswap bench`."""
