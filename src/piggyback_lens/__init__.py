"""Where in the chat template a narrow finetune is carried."""
