# Step 3, before the model runs: a prompt set is numbered and split into groups and shards.
rule split:
    input:
        model=lambda wildcards: STUDY.runtime_model(wildcards.model),
        prompts=lambda wildcards: STUDY.prompts(wildcards.run, wildcards.model),
    output:
        f"{RESULTS}/{{model}}/{{run}}/prompts.parquet",
    log:
        f"{RESULTS}/logs/split/{{model}}/{{run}}.log",
    benchmark:
        f"{RESULTS}/logs/split/{{model}}/{{run}}.bench.tsv"
    # a prompt that does not fit is told of before hours of calibration, not after them
    priority: 1
    conda:
        "../envs/generate.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: attempt * 2000,
        runtime=lambda wildcards, attempt: attempt * 10,
    params:
        options=lambda wildcards: options(STUDY.runs[wildcards.run].prompt_set),
        batching=lambda wildcards: options(STUDY.runs[wildcards.run].batching),
        texts=lambda wildcards: STUDY.texts(wildcards.run),
        source=source_hash("generation.prompts"),
    message:
        "Splitting the prompts of run {wildcards.run} for {wildcards.model}"
    shell:
        "sparsetrace split {input.model:q} --prompts {input.prompts:q} --out {output:q}"
        " {params.options} {params.batching} {params.texts} > {log:q} 2>&1"
