"""A model written anew, shard by shard: block-scaled FP8 to BF16 and back, and LoRA adapters merged into their base.

folder --weights.Weights--> tensors, read by rows --convert.items--> rows of new tensors --shards.write--> NAME.partial
       --files.carry--> config, index, tokenizer, template --rename--> NAME
"""
