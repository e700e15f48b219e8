"""How many visual tokens each layer of a trained model needs: a search on calibration data, and a sweep over settings.
Source: vision-token-search."""
