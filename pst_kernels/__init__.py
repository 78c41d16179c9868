"""pst_kernels: fine-tune a pretrained transformer into a sparse one, with a drop-in for nn.Linear."""
