# Step 3: sparse decoding of one shard with a patched model, capturing every operand.
rule generate:
    input:
        model=lambda wildcards: STUDY.runtime_model(wildcards.model),
        thresholds=rules.thresholds.output[0],
        prompts=rules.split.output[0],
        tokens=lambda wildcards: expand(
            rules.dense_tokens.output[0],
            shard=STUDY.dense_tokens(wildcards.run, wildcards.shard),
            model=wildcards.model,
            run=wildcards.run,
        ),
    output:
        # The blocks lie beside it, undeclared: after a kill Snakemake deletes declared files, and with them it would
        # delete sealed groups. Temporary, because packing removes the blocks that the manifest lists.
        temp(f"{RESULTS}/{{model}}/{{run}}/{{label}}/dump/{{shard}}/manifest.json"),
    log:
        f"{RESULTS}/logs/generate/{{model}}/{{run}}/{{label}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/logs/generate/{{model}}/{{run}}/{{label}}/{{shard}}.bench.tsv"
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
        tokens=lambda wildcards, input: repeated("--tokens", input.tokens),
        decoding=lambda wildcards: options(STUDY.runs[wildcards.run].decoding),
        batching=lambda wildcards: options(STUDY.runs[wildcards.run].batching),
        capture=lambda wildcards: options(STUDY.runs[wildcards.run].capture),
        machine=options(STUDY.machine),
        source=source_hash("generation.generate"),
    message:
        "Generating shard {wildcards.shard} of {wildcards.model}, run {wildcards.run}, under {wildcards.label}"
    shell:
        "sparsetrace generate {input.model:q} --thresholds {input.thresholds:q} --prompts {input.prompts:q}"
        " --shard {params.shard} {params.tokens} --out {output:q} {params.decoding} {params.batching}"
        " {params.capture} {params.machine} > {log:q} 2>&1"
