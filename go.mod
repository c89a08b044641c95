module github.com/tcprelay/relay

go 1.26

require (
	github.com/inconshreveable/muxado v0.0.0-20160802230925-fc182d90f26e
	golang.org/x/sync v0.20.0
)
