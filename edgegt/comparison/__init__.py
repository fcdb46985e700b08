"""`edgegt compare`: edgegt against full fine-tuning, PEFT's adapters and simpler selections, on equal terms."""
