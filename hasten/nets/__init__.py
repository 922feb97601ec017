"""Networks that hasten trains and ships. They import torch and nothing of hasten."""
