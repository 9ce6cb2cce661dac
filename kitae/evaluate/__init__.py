"""Evaluation: records per item, summaries of records, summaries by a data column, and paired comparison.

problems --accuracy.answer--> Records --accuracy.summarise--> accuracy, format rate, pass@k ...
rows     --perplexity.score-> LossRecords --perplexity.summarise--> loss, perplexity
records  --groups.by_column-> one summary per value of a column, and the gap between them
two models' Records --compare.compare--> difference, its interval, p value
"""
