# Step 4, once all shards are packed: the tables, data card and manifest of the workload.
rule index:
    input:
        parts=lambda wildcards: expand(
            rules.pack.output[0],
            shard=STUDY.shards(wildcards.run),
            model=wildcards.model,
            run=wildcards.run,
            label=wildcards.label,
        ),
        masks=lambda wildcards: STUDY.weight_masks(wildcards.model),
    output:
        f"{RESULTS}/{{model}}/{{run}}/{{label}}/workload/manifest.json",
    log:
        f"{RESULTS}/logs/index/{{model}}/{{run}}/{{label}}.log",
    benchmark:
        f"{RESULTS}/logs/index/{{model}}/{{run}}/{{label}}.bench.tsv"
    conda:
        "../envs/pack.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: attempt * 2000,
        runtime=lambda wildcards, attempt: attempt * 30,
    params:
        masks=lambda wildcards, input: repeated("--weight-masks", input.masks),
        workload=subpath(output[0], parent=True),
        study=lambda wildcards: STUDY.excerpt(
            wildcards.model, wildcards.run, wildcards.label
        ),
        source=source_hash("packing.index"),
    message:
        "Indexing {wildcards.model}, run {wildcards.run}, under {wildcards.label}"
    shell:
        "sparsetrace index {input.parts:q} {params.masks} --workload {params.workload:q} --study {params.study:q}"
        " > {log:q} 2>&1"
