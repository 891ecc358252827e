"""The operators' raw contracts in plain torch: any device, any floating dtype."""
