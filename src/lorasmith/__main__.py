from lorasmith.cli.app import main

main()
