from tilewise.bench.serving.run import main

main()
