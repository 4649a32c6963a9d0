"""One benchmark run: data -> pretrain or load -> unlearn with each method -> evaluate -> record."""
