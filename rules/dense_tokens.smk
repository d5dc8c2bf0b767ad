# For `tokens_from: dense`: the dense model's continuation of one shard's prompts, once for all settings of a run.
rule dense_tokens:
    input:
        model=lambda wildcards: STUDY.runtime_model(wildcards.model),
        prompts=rules.split.output[0],
    output:
        # Not temporary: a setting that is added later must be fed the same tokens, and another machine may produce
        # different ones. The tokens lie beside it, undeclared: after a kill Snakemake deletes declared files, and with
        # them it would delete sealed groups.
        f"{RESULTS}/{{model}}/{{run}}/dense_tokens/{{shard}}/manifest.json",
    log:
        f"{RESULTS}/logs/dense_tokens/{{model}}/{{run}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/logs/dense_tokens/{{model}}/{{run}}/{{shard}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=STUDY.gpus,
        mem_mb=lambda wildcards, input, attempt: STUDY.needs(
            "generate", wildcards.model, input.model, attempt
        ).mem_mb,
        runtime=lambda wildcards, input, attempt: STUDY.needs(
            "generate", wildcards.model, input.model, attempt
        ).runtime,
    params:
        shard=lambda wildcards: int(wildcards.shard),
        sampling=lambda wildcards: options(STUDY.runs[wildcards.run].decoding.sampling),
        batching=lambda wildcards: options(STUDY.runs[wildcards.run].batching),
        machine=options(STUDY.machine),
        source=source_hash("generation.generate"),
    message:
        "Dense tokens of shard {wildcards.shard} of {wildcards.model}, run {wildcards.run}"
    shell:
        "sparsetrace dense-tokens {input.model:q} --prompts {input.prompts:q} --shard {params.shard} --out {output:q}"
        " {params.sampling} {params.batching} {params.machine} > {log:q} 2>&1"
